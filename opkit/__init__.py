"""opkit: no latency enters a table before its mock layer is proven to launch what the engine
launches.

Sub-packages, in the order in which a kernel name becomes a verdict:

* ``layers``        what is measured: ops, cases, mock layers and the process that nsys profiles;
* ``nsys_parsers``  what was launched: an nsys export becomes one kernel table;
* ``align``         are they the same: regions, matching, checks, verdict, ledger;
* ``reports``       what people see.

Importing this package needs neither torch nor a GPU nor nsys.
"""

__version__ = "0.1.0"
