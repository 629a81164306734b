"""Where does each token go: questions to autograd, from one tensor of the graph back to another.

A token map says at which position each upstream token, pixel, word or region enters. Where the
graph itself proves that they stay in place, nothing is asked (`in_place.py`).
"""
