# mbx with everything that runs on a CPU: docker build -f docker/cpu.Dockerfile -t mbx .
FROM python:3.12-slim AS build
COPY . /source
# PyTorch's own index has the builds without CUDA
RUN python -m venv /opt/mbx \
 && /opt/mbx/bin/pip install --no-cache-dir --constraint /source/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu "/source[all]"

FROM python:3.12-slim
COPY --from=build /opt/mbx /opt/mbx
ENV PATH=/opt/mbx/bin:$PATH
RUN useradd --create-home --uid 1000 mbx
USER 1000
WORKDIR /work
ENTRYPOINT ["mbx"]
CMD ["--help"]
