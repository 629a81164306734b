"""What each operation was: the rules of a backward pass are chosen when that pass runs.

A function mode below the tap puts gates on operands and bridges on outputs into the graph. With
no rules in force they do nothing; else they hand on what the rules in force say.
"""
