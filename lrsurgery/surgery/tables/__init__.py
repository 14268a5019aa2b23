"""Tables of tokens, which are looked up, and the heads that are tied to them."""
