from django.db import models


class Order(models.Model):
    receipt = models.CharField(max_length=200, blank=True)

    def __str__(self) -> str:
        return f"order {self.pk}"
