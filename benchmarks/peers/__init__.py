"""Other programs on the same model, text and judge: one module a program, each run in an environment of its own."""
