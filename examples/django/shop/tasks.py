try:
    from django.tasks import task  # Django 6
except ModuleNotFoundError:
    from django_tasks import task  # before: pip install django-tasks

from shop.models import Order


@task(deadline=60)
def send_receipt(order_id: int) -> None:
    Order.objects.filter(pk=order_id).update(receipt=f"Thank you for order {order_id}.")
