# mbx on NVIDIA's PyTorch image, whose torch and Transformer Engine pip keeps: docker build -f docker/gpu.Dockerfile -t mbx-gpu .
FROM nvcr.io/nvidia/pytorch:26.04-py3
COPY . /source
RUN pip install --no-cache-dir "/source[all]" \
 && python -c "import torch, transformer_engine; assert torch.version.cuda, 'the image lost its torch'"
WORKDIR /work
CMD ["mbx", "doctor"]
