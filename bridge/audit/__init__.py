"""What a compiler makes of each method, for a platform that need not be there."""

from bridge.audit.audit import Audit as Audit
from bridge.audit.audit import Finding as Finding
from bridge.audit.audit import audit as audit
from bridge.audit.compiling import Subject as Subject
from bridge.audit.platforms import PLATFORMS as PLATFORMS
