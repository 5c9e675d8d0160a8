"""Inference weights: our folder, and the files of the released checkpoint."""
