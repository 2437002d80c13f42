"""Imports that load libraries, apart from the start of Ray's processes.

Ray forks its processes with code that runs before they begin, and that can hang if another thread loads a library at
that moment, as the import of torch does.
"""

import threading

LOADING = threading.RLock()
"""Held while Ray's processes are started, and while a thread that may run beside that imports torch or a library."""
