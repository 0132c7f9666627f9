#!/usr/bin/env bash
# What a container of the image is: the head, a worker, the fleet's keeper, the queue's dispatcher, the
# MLflow server, or what makes the queue's database.
# Everything else comes by environment variables (infra/README.md); one that is missing is named
# before anything starts.
set -euo pipefail

need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  if ((${#missing[@]})); then
    echo "entrypoint: $role needs ${missing[*]}: see infra/README.md, section «What a node is told»" >&2
    exit 64
  fi
}

readable() {
  local name
  need "$@"
  for name in "$@"; do
    if [[ ! -r ${!name} ]]; then
      echo "entrypoint: $role can't read ${!name} ($name): has liftyard-credentials run, and does user $(id -u) own it?" >&2
      exit 66
    fi
  done
}

role=${1:-help}
shift || true

case $role in
  head | worker)
    need LIFTYARD_ENVIRONMENT LIFTYARD_POOL LIFTYARD_HEAD_HOST LIFTYARD_NODE_ADDRESS \
      LIFTYARD_RAY_PORT LIFTYARD_DASHBOARD_PORT LIFTYARD_DASK_PORT LIFTYARD_SERVE_PORT \
      LIFTYARD_STORAGE_ROOT LIFTYARD_STATE_DIR MLFLOW_TRACKING_URI RAY_ADDRESS
    readable RAY_AUTH_TOKEN_PATH RAY_TLS_CA_CERT RAY_TLS_SERVER_CERT RAY_TLS_SERVER_KEY
    # The head's own address would make `ray start --head` refuse to start a second one.
    [[ $role == worker ]] || unset RAY_ADDRESS
    exec python -m cluster.bootstrap "$role" "$@"
    ;;
  fleet)
    need LIFTYARD_FLEET_PARAMETER LIFTYARD_DRAIN_QUEUE_URL RAY_ADDRESS
    readable RAY_AUTH_TOKEN_PATH RAY_TLS_CA_CERT RAY_TLS_SERVER_CERT RAY_TLS_SERVER_KEY
    exec python "$(dirname "$0")/fleet.py" "$@"
    ;;
  dispatcher)
    need LIFTYARD_QUEUE_URL LIFTYARD_HEAD_HOST LIFTYARD_DASHBOARD_PORT
    readable RAY_AUTH_TOKEN_PATH PGPASSFILE PGSSLROOTCERT
    exec python -m jobs.dispatch --queue "$LIFTYARD_QUEUE_URL" \
      --dashboard "http://$LIFTYARD_HEAD_HOST:$LIFTYARD_DASHBOARD_PORT" "$@"
    ;;
  queue)
    need LIFTYARD_DATABASE_URL
    readable PGPASSFILE LIFTYARD_QUEUE_PASSWORD
    exec python "$(dirname "$0")/queue_database.py" "$@"
    ;;
  tracking)
    need LIFTYARD_TRACKING_HOST LIFTYARD_TRACKING_PORT LIFTYARD_ARTIFACTS_ROOT LIFTYARD_DATABASE_URL
    readable PGPASSFILE
    exec mlflow server \
      --host 0.0.0.0 --port "$LIFTYARD_TRACKING_PORT" \
      --allowed-hosts "$LIFTYARD_TRACKING_HOST:$LIFTYARD_TRACKING_PORT,localhost:$LIFTYARD_TRACKING_PORT" \
      --backend-store-uri "$LIFTYARD_DATABASE_URL" \
      --artifacts-destination "$LIFTYARD_ARTIFACTS_ROOT" "$@"
    ;;
  help | --help | -h)
    echo "usage: entrypoint.sh head|worker|fleet|dispatcher|tracking|queue [option…], configured by environment variables (infra/README.md)"
    ;;
  *)
    echo "entrypoint: role '$role': allowed are head, worker, fleet, dispatcher, tracking, queue and help" >&2
    exit 64
    ;;
esac
