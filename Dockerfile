# jkoflow on CPUs: docker build -t jkoflow . && docker run --rm -v "$PWD:/data" jkoflow generate --run zoo:mnist --out grid.png
# For GPUs, take a base image with PyTorch and CUDA: --build-arg BASE=pytorch/pytorch:latest
ARG BASE=python:3.11-slim
FROM ${BASE}
COPY . /source
RUN pip install --no-cache-dir /source && rm -r /source
ENV JKOFLOW_HOME=/data/.jkoflow
WORKDIR /data
ENTRYPOINT ["jkoflow"]
