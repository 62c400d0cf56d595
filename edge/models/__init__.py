"""New models on a running line: fetched, checked, tried beside the present one, switched to, and rolled back.

    broker ──> Fetcher ──> check ──> Keeper ──> Shadow ──(agrees)──> switch ──> Trial ──(proves bad)──> roll back
                                       │
                                    Record (STATE/models/record.json): the last decision, before it takes effect

A line judges with what the record says, from the first part after a crash on.
"""
