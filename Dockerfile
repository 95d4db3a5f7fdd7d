# docker build --tag block-admm . && docker run --rm --volume "$PWD/outputs:/block-admm/outputs" block-admm
FROM python:3.12-slim
# PyTorch's own index has a build for the processor alone, which is a tenth of the size.
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /block-admm
COPY . .
RUN make env
CMD ["make", "demo"]
