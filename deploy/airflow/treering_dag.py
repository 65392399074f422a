"""One pass of treering over a workspace every night, for Airflow 3; put it into the folder of the DAGs."""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

WORKSPACE = "/srv/treering/shop"

with DAG(
    dag_id="treering",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,  # A pass takes all that waits: yesterday's would find nothing left.
    max_active_runs=1,
    tags=["treering"],
):
    BashOperator(
        task_id="update",
        bash_command=f"exec treering watch --once --json -w {WORKSPACE}",  # exec: SIGTERM reaches treering itself.
        retries=2,
        retry_delay=timedelta(minutes=1),
    )
