-- KEYS: w, l and m of every account. ARGV: lease, ttl ms, tokens, money; then for every account
-- window ms, requests, tokens, concurrent, day, month, 1 for a budget ("" does not restrict).
-- Gives {1, requests left, tokens left} of the first account, or {0, account, limit, wait ms}.
local lease, ttl = ARGV[1], tonumber(ARGV[2])
local tokens, money = tonumber(ARGV[3]), tonumber(ARGV[4])
local left = {0, 0}
local count = #KEYS / 3

for i = 1, count do
  local name = string.sub(KEYS[3 * i - 2], 1, -3)
  local a = 4 + (i - 1) * 7
  local window, requests, most = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local concurrent, of_day, of_month = tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5]), tonumber(ARGV[a + 6])
  local width = window / PARTS
  local part = math.floor(now / width)
  expire(name)
  local used = windows(name, part)
  if concurrent and redis.call('ZCARD', name .. ':l') >= concurrent then
    return {0, i, 'concurrent', 1000}
  end
  if requests and used.requests + 1 > requests then
    return {0, i, 'requests', wait(used.r, width, used.requests + 1 - requests)}
  end
  if most and used.tokens + tokens > most then
    if tokens > most then return {0, i, 'tokens', -1} end
    return {0, i, 'tokens', wait(used.t, width, used.tokens + tokens - most)}
  end
  if of_day or of_month then
    local s = spent(name)
    if of_day and s.d + s.held + money > of_day then
      return {0, i, 'spend_day', s.d + money <= of_day and 1000 or ms_left(false)}
    end
    if of_month and s.m + s.held + money > of_month then
      return {0, i, 'spend_month', s.m + money <= of_month and 1000 or ms_left(true)}
    end
  end
  if i == 1 then
    left = {(requests or 0) - used.requests - 1, (most or 0) - used.tokens - tokens}
  end
end

for i = 1, count do
  local name = string.sub(KEYS[3 * i - 2], 1, -3)
  local a = 4 + (i - 1) * 7
  local window = tonumber(ARGV[a + 1])
  local part = integer(math.floor(now / (window / PARTS)))
  redis.call('HINCRBY', name .. ':w', 'r' .. part, 1)
  redis.call('HINCRBY', name .. ':w', 't' .. part, integer(tokens))
  redis.call('ZADD', name .. ':l', now + ttl, lease)
  redis.call('HINCRBY', name .. ':m', 'held', integer(money))
  redis.call('HSET', name .. ':m', 'L' .. lease, part .. ' ' .. integer(tokens) .. ' ' .. integer(money))
  keep(name, window, ttl, ARGV[a + 7] == '1')
end
return {1, left[1], left[2]}
