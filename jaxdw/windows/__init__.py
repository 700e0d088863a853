"""Windows: exact extraction, its adjoint, contraction with a kernel, and functions of windows."""

from jaxdw.windows.contraction import contract as contract
from jaxdw.windows.extraction import unfold as unfold
from jaxdw.windows.folding import fold as fold
from jaxdw.windows.mapping import map_windows as map_windows
