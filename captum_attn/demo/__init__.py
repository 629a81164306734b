"""The demo: one prediction of a text model and of an image model, explained end to end.

Everything it needs is in the extra ``demo``; nothing is downloaded at run time.
"""
