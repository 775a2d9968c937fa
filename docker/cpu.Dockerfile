# mbx with everything that runs on a CPU: docker build -f docker/cpu.Dockerfile -t mbx .
FROM python:3.12-slim AS build
COPY . /source
# PyTorch's own index has the builds without CUDA; it is asked alone, so that a build without it fails rather than grows
RUN python -m venv /opt/mbx \
 && /opt/mbx/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
    "$(grep '^torch==' /source/constraints.txt)" \
 && /opt/mbx/bin/pip install --no-cache-dir --constraint /source/constraints.txt "/source[all]"

FROM python:3.12-slim
COPY --from=build /opt/mbx /opt/mbx
ENV PATH=/opt/mbx/bin:$PATH
RUN useradd --create-home --uid 1000 mbx
USER 1000
WORKDIR /work
ENTRYPOINT ["mbx"]
CMD ["--help"]
