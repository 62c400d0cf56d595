"""The operator's page, and HTTP endpoints for programs: metrics and health.

OutboxWriter ──> PartHistory (recent parts) ───────> OperatorPage ──> server (starlette on uvicorn, a thread)
            └──> LineMetrics (Prometheus) ────────────┘
"""
