"""CONVENTION: the named mistakes, one file for each kind, and the search among them."""
