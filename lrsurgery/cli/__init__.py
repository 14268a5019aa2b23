"""Parse, call one function, render."""
