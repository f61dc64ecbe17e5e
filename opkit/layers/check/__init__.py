"""IS THE MOCK SOUND: the checklist that a mock passes before it is aligned.

The parent (:mod:`opkit.layers.check.run`) starts ``python -m opkit.layers.check PLAN.json`` under
the interpreter that has the framework; the child builds the mock once, looks at it case by case
(``observe``), and judges what it saw (``judge``). Nothing here knows an op or a backend: only the
Mock protocol is used.
"""
