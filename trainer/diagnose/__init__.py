"""What a gradient does and why it does not: mistakes in a sentence, parameters that get none, what keeps a graph alive.

Nothing in this room costs anything while all is well: it looks once something is wrong, or when it is asked.
"""
