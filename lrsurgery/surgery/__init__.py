"""Kinds of layers, ranks, budgets and plans, and their application to a model in memory."""
