"""The programs that a compiler makes of each method, for a platform that need not be present."""

from bridge.audit.compiling import AuditSubject as AuditSubject
from bridge.audit.findings import audit as audit
from bridge.audit.platforms import PLATFORMS as PLATFORMS
from bridge.audit.platforms import platform as platform
from bridge.audit.records import Audit as Audit
from bridge.audit.records import AuditFinding as AuditFinding
