from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from shop.models import Order
from shop.tasks import send_receipt


@csrf_exempt  # so that curl may ask
@require_POST
@transaction.atomic
def pay(_request: HttpRequest) -> HttpResponse:
    order = Order.objects.create()
    send_receipt.enqueue(order.pk)  # with the order, or not at all
    return HttpResponse(f"{order.pk}\n", status=202)


def receipt(_request: HttpRequest, order_id: int) -> HttpResponse:
    return HttpResponse(Order.objects.get(pk=order_id).receipt)


urlpatterns = [
    path("pay", pay),
    path("receipt/<int:order_id>", receipt),
    path("", include("safedefer.frameworks.django.urls")),
]
