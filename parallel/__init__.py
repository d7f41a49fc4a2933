"""Ranks: launching, meshes, collectives and the all-to-all. These files know no model."""
