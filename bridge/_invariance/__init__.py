"""Whether the result of one sample changes with its batch, with threads, with the instruction set and so on."""
