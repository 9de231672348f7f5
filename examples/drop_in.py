"""An ordinary PyTorch training loop, changed from cross-entropy to NTDNELoss.

    python examples/drop_in.py

Lines marked "was" replace those of the ordinary loop, lines marked "new" are added; the rest stays. For your own
images put your dataset, of (image, label), in the place of the TensorDataset. The encoder's outputs are now features
to compare images by, so a class comes from the nearest neighbours instead of the largest logit.

Shapes: B images of a batch, N training images, M test images, D features, C classes.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntdne_kernels import IndexedDataset, NTDNELoss

torch.manual_seed(0)
EPOCHS, D = 15, 64

digits = load_digits()
train_images, test_images, train_labels, test_labels = train_test_split(
    torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1),  # (N + M, 1, 8, 8)
    torch.tensor(digits.target),
    test_size=0.2,
    random_state=0,
)
dataset = IndexedDataset(TensorDataset(train_images, train_labels))  # was: TensorDataset(train_images, train_labels)
loader = DataLoader(dataset, batch_size=128, shuffle=True)

encoder = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
    nn.Linear(1024, D),  # was: nn.Linear(1024, C)
)
criterion = NTDNELoss(dataset.labels, D)  # was: nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(encoder.parameters())

for epoch in range(EPOCHS):
    criterion.set_epoch(epoch)  # new
    encoder.train()
    total = 0.0
    for images, _, index in loader:  # was: for images, labels in loader
        outputs = encoder(images)  # (B, D)
        loss = criterion(outputs, index)  # was: criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        criterion.update_bank(outputs, index)  # new
        total += loss.item() * len(images)
    print(f"epoch {epoch + 1:2}  loss {total / len(dataset):.3f}")

encoder.eval()
with torch.no_grad():
    features = nn.functional.normalize(encoder(test_images), dim=1)  # (M, D)
bank = criterion.memory.rows(torch.arange(len(dataset)))  # (N, D) features of the training images
classifier = KNeighborsClassifier(10).fit(bank, train_labels)  # was: outputs.argmax(dim=1)
print(f"test accuracy {classifier.score(features, test_labels):.1%}")
