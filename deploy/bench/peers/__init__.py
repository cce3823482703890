"""Headwise beside other engines on this machine: `headwise bench peers`.

`compare.py` is the way in, `contender.py` what an engine has to do to take part.
"""
