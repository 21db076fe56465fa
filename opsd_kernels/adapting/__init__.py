"""Replaces functions of another library by ours, for the adapters `trl` and `verl`.

patches.py  replaces functions after comparing signatures, and puts them back
routes.py   counts whose losses were computed, and warns of those that stay the library's
"""
