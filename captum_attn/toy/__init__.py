"""Small trained models with their data, carried by the package.

Digits, textures, clothing, questions and topics: what the demo, `evaluate`, the dashboards, the
tutorials and the tests explain. Nothing is downloaded.
"""
