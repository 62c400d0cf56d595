"""The self-test with golden parts: known parts, judged again and again, so that a line that has gone blind is noticed.

schedule (pure) -> tester (one camera's tests, their record, their thread)
"""
