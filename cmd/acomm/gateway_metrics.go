package main

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// gatewayMetrics are the counts of a gateway, with a registry of their own.
type gatewayMetrics struct {
	registry        *prometheus.Registry
	requests        *prometheus.CounterVec
	refused         *prometheus.CounterVec
	responses       *prometheus.CounterVec
	timeouts        *prometheus.CounterVec
	forwardFailures *prometheus.CounterVec
	seconds         *prometheus.HistogramVec
}

func newGatewayMetrics(outstanding func() int64) *gatewayMetrics {
	const prefix = "acomm_gateway_"
	m := &gatewayMetrics{registry: prometheus.NewRegistry()}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: prefix + name, Help: help}, labels)
		m.registry.MustRegister(c)
		return c
	}
	m.requests = counter("requests_total", "Requests that could be read.", "task")
	m.refused = counter("refused_total", "Requests that were not acknowledged.", "task", "reason")
	m.responses = counter("responses_total", "Responses from providers.", "task", "result")
	m.timeouts = counter("timeouts_total", "Requests without a response in time.", "task")
	m.forwardFailures = counter("forward_failures_total", "Responses and time-outs that did not arrive at their hook, or may not have.", "task")
	m.seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    prefix + "response_seconds",
		Help:    "Time from a request to its response.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10), // to 131 s
	}, []string{"task"})
	m.registry.MustRegister(m.seconds,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: prefix + "outstanding",
			Help: "Requests that wait for their response, or whose response is being sent to the hook.",
		}, func() float64 { return float64(outstanding()) }),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	return m
}

func (m *gatewayMetrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 8})
}
