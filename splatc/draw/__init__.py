"""Pictures of masks: the pieces that splatc finds and the tiles that a kernel visits, in a file or in a terminal.

drawing = Drawing.of(patterns.parse("fixed(128, 16)"), 1024)
save(drawing, "fixed.png")
"""

from splatc.draw.figure import figure, save
from splatc.draw.raster import Drawing
from splatc.draw.terminal import print_to

__all__ = ["Drawing", "figure", "print_to", "save"]
