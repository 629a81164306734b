"""What ran: every softmax(QK^T)V and every input of one forward run.

The tap is a function mode around the run: it writes down attention calls and leaves, and changes
nothing. `restore` leaves the model as it was found.
"""
