# An image for TPUs, as launch/gke.sh starts it:
#
#   docker build -f launch/docker/tpu.Dockerfile -t diffit_jax .
#
# built in the folder of the repository, which is its working folder, too.
FROM python:3.12-slim
WORKDIR /diffit_jax
COPY constraints.txt setup.py pyproject.toml README.md LICENSE ./
COPY diffit_jax diffit_jax
COPY configs configs
COPY launch launch
RUN python -m pip install --no-cache-dir -c constraints.txt -e '.[tpu,gcp]'
ENV PYTHONUNBUFFERED=1
CMD ["python", "-m", "diffit_jax.main", "--help"]
