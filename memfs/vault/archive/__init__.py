"""Archives of cubes: written, checked before anything is used, loaded, signed."""
