from hypothesis import settings

# The same examples on every machine: what CI sees is what a contributor sees.
settings.register_profile("opsd", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("opsd")
