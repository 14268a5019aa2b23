"""Tasks whose answers are more than a class: tags of words, texts, spans of a text."""
