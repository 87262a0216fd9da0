"""Tables of the paper at the size of one machine: what is run, how, and what it says."""
