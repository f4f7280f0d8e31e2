"""Pure functions of tensors. Shapes stand in names: B rows, T tokens, `_2B` chosen rows followed by rejected rows."""
