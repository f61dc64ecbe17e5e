"""ARE THEY THE SAME: profile both sides, find regions, match kernels, check, judge, record.

The path of a kernel name to a verdict, file by file: ``profile/`` makes the two traces,
``regions`` cuts the
op's kernels out of them, ``match`` lays mock and E2E beside each other, ``checks`` applies one
rule each,
``judge`` turns outcomes into the verdict, ``ledger`` remembers it. Nothing here prints.
"""
