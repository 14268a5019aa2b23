"""The kinds of layers that can be factorised, a file for each family; `table` lists them."""
