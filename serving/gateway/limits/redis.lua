-- The arithmetic of account.py, inside Redis. This text stands before reserve.lua and settle.lua.
-- An account has three keys: <name>:w, a hash of its windows (r<part> requests, t<part> tokens);
-- <name>:l, a sorted set of its leases by expiry in ms; <name>:m, a hash of what was spent (day, d,
-- month, m), what is held, and for each lease what it holds ("part tokens money").
-- All times come from this server's clock. Money is billionths: integers below 2^53.
local PARTS = 20
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local day = math.floor(clock[1] / 86400)

-- Year and month of a day since 1970 (the proleptic Gregorian calendar, days from 0000-03-01).
local function month_of(days)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524)
    - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 2 or mp - 10
  return (yoe + era * 400 + (month <= 1 and 1 or 0)) * 12 + month
end

local function ms_left(of_month)
  local last = day
  if of_month then
    while month_of(last + 1) == month_of(day) do last = last + 1 end
  end
  return (last + 1) * 86400000 - now
end

local function integer(value) return string.format('%.0f', value) end

-- Redis does not take "-0".
local function negative(text) return integer(0 - tonumber(text)) end

-- Return what the leases that have expired hold.
local function expire(name)
  local gone = redis.call('ZRANGEBYSCORE', name .. ':l', '-inf', now, 'LIMIT', 0, 1000)
  for _, lease in ipairs(gone) do
    local held = redis.call('HGET', name .. ':m', 'L' .. lease)
    if held then
      local at, tokens, money = string.match(held, '(%d+) (%d+) (%d+)')
      if redis.call('HEXISTS', name .. ':w', 't' .. at) == 1 then
        redis.call('HINCRBY', name .. ':w', 't' .. at, negative(tokens))
      end
      redis.call('HINCRBY', name .. ':m', 'held', negative(money))
      redis.call('HDEL', name .. ':m', 'L' .. lease)
    end
    redis.call('ZREM', name .. ':l', lease)
  end
end

-- The parts of both windows that count, oldest first, and their sums; others are removed.
local function windows(name, part)
  local found = {r = {}, t = {}, requests = 0, tokens = 0}
  local flat = redis.call('HGETALL', name .. ':w')
  for i = 1, #flat, 2 do
    local kind, at = string.sub(flat[i], 1, 1), tonumber(string.sub(flat[i], 2))
    if at < part - PARTS then
      redis.call('HDEL', name .. ':w', flat[i])
    else
      local amount = tonumber(flat[i + 1])
      table.insert(found[kind], {at, amount})
      if kind == 'r' then found.requests = found.requests + amount
      else found.tokens = found.tokens + amount end
    end
  end
  return found
end

-- Milliseconds until ``need`` have left a window.
local function wait(parts, width, need)
  table.sort(parts, function(a, b) return a[1] < b[1] end)
  for _, entry in ipairs(parts) do
    need = need - entry[2]
    if need <= 0 then return math.max(1, (entry[1] + PARTS + 1) * width - now) end
  end
  return PARTS * width
end

-- What was spent in this day and month, begun anew when they are new; a clock that went back
-- changes nothing.
local function spent(name)
  local m = redis.call('HMGET', name .. ':m', 'day', 'd', 'month', 'm', 'held')
  local found = {d = tonumber(m[2] or 0), m = tonumber(m[4] or 0), held = tonumber(m[5] or 0)}
  if day > tonumber(m[1] or 0) then
    found.d = 0
    redis.call('HSET', name .. ':m', 'day', day, 'd', 0)
  end
  local month = month_of(day)
  if month > tonumber(m[3] or 0) then
    found.m = 0
    redis.call('HSET', name .. ':m', 'month', month, 'm', 0)
  end
  return found
end

-- Idle accounts go away: money after the longest month, the rest with window and leases.
local function keep(name, window, ttl, budget)
  redis.call('PEXPIRE', name .. ':w', 2 * window + 2 * ttl)
  redis.call('PEXPIRE', name .. ':l', 2 * window + 2 * ttl)
  redis.call('PEXPIRE', name .. ':m', budget and 32 * 86400000 or 2 * window + 2 * ttl)
end
