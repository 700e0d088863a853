"""Conformance of anybody's depthwise kernel: its results on drawn problems against exact ones."""
