# The server on CPU. The C++ kernels choose their instruction set at run time, so the image runs on any x86-64.
#   docker build -t roberta-fast .
#   docker run -p 8000:8000 -v $PWD/my-model:/model roberta-fast --model /model
FROM python:3.12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir "setuptools>=77" wheel ninja pybind11 "numpy<2.4"
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY benchmarks benchmarks
COPY roberta_fast roberta_fast
RUN ROBERTA_FAST_BUILD=cpu pip install --no-cache-dir --no-build-isolation ".[serve]"

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 server
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
USER server
WORKDIR /home/server
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["roberta-fast", "serve", "--host", "0.0.0.0"]
CMD ["--help"]
