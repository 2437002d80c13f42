"""Models of the Segment Anything family behind one interface, a module for each kind of code that runs them."""
