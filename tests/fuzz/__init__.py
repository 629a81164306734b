"""Every public function with every mistake: refused by an `AttnError` that names the argument.

A room's file lists its functions as `Public`s: arguments that work, and of which kind each
argument is. `kinds` has the mistakes of every kind. `test_fuzz` holds the rooms to it,
`python -m tests.fuzz.count` counts.
"""
