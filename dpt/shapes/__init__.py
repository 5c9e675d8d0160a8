"""The embedded world: scenes of simple shapes, whose ground truth is exact."""
