"""How long a test waits for what it started."""

# Seconds after which a process that a test started is taken for one that hangs: many times what the longest needs, a
# build or the tests of a file under the sanitizers.
TIMEOUT = 1500
