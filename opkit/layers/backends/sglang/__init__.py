"""SGLang 0.5.14: its server's arguments cut down to one layer, its model runner driven by hand."""
