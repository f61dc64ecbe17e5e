"""HOW A NEW OP BEGINS: files that work, to be replaced part by part (``opkit new OP``)."""
